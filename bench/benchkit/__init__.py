"""What the scripts of bench/ share: timing in turns, the machine, the peers, records of figures, tables, plots."""
