"""Text to tokens to activations.

| module | what happens there |
|---|---|
| `sources`, `files`, `hub` | named documents: of Python's library, the user's files, a data set |
| `formats` | how each kind of file is read |
| `packing` | documents to blocks of tokens, in three splits, cached on disk |
| `loader` | which blocks come in which order |
| `draws` | which layers each token draws |
| `filters` | which tokens count |
| `rows` | drawn tokens to rows of activations |
| `exchange` | rows on their way to the processes that need them |
| `store/` | activations on disk |
| `batch` | what training gets |
| `activations` | the DataModule, and its reader: live or stored |
"""
