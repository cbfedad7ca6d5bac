"""What each objective does: reads rows, loads its model, collates, builds its loss."""
