"""The numbers and the last sessions, for people and for scrapers."""
