"""Methods compared: settings, runs, tables, figures, the command."""
