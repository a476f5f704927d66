"""groupsae's training compared with that of other libraries, each in an environment of its own."""
