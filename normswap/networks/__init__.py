"""The user's network in, facts and copies out: it is only read here."""
