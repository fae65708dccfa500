"""Measurements that take too long for the tests; each writes its page in docs/."""
