"""Eyes: events, plans and states as text, tables and JSON; nothing here decides or acts."""
