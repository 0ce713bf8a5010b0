"""Routing: which expert sees which token, and with what weight. See `router.build` and `papers`."""
