"""A trained suite of SAEs: load, save, encode, decode; export and import; the Hub."""
