"""From TOML files to what a recipe says: tables merged, patterns of files, faults told with their place, the schema."""
