"""`sdft report`: pages and pictures of what runs have written."""
