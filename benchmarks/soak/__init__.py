"""Mixed traffic for minutes, with memory checks on and answers compared with dense ones."""
