"""The file formats of other libraries: an SAE of ours to a folder of theirs, and back."""
