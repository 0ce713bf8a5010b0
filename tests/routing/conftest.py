"""Beside it lies what the tests of all stages import: the folder of a conftest is searched for modules."""
