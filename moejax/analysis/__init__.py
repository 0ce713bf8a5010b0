"""Analysis: the report of a run, its pictures, and the routes of a batch."""
