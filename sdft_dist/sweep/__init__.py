"""`sdft sweep`: whole runs over a space of settings, on Ray Tune."""
