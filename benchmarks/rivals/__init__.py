"""groupsae's training beside that of other libraries, each in an environment of its own."""
