"""Routing: which expert sees which token, and with what weight. `router.build` makes one; `papers` has known ones."""
