"""Who answered what right, and at what cost: our own table, and readers of tables that others publish."""
