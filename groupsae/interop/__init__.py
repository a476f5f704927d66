"""SAEs in the formats of other libraries: export, import, the page of a repository on the Hub."""
