"""From the rows of each family of objectives to records."""
