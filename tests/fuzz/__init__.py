"""Fuzz targets, run by hand and by CI."""
