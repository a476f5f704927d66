"""A trained suite of SAEs: load, save, encode, decode; the Hub."""
