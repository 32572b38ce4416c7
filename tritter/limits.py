"""How large a model may be: above what anybody builds, below what would fill a machine by itself.

Whatever states sizes (a config.json, the keys of a run, the targets of an expansion, the ends of
a plan) is held against these before anything is counted, listed or built. Numbers alone: nothing
is imported here, so that a refused word is answered at once.
"""

MAX_LAYERS = 10**4
MAX_WIDTH = 2**20  # of the hidden size, of an FFN, of all heads together
MAX_EXPERTS = 4096  # of a layer
MAX_VOCABULARY = 2**24
MAX_PARAMETERS = 10**14
MAX_TENSORS = 2**18  # on disk: 10⁴ layers of 4096 experts each would be 10⁸ names
MAX_LABELS = 2**16  # transformers writes a name out for each
MAX_POSITIONS = 2**31 - 1
MAX_BATCH_TOKENS = 2**28
MAX_NEW_TOKENS = 2**20
MAX_COUNT = 10**9  # of whatever has no limit of its own: steps, tokens, documents
MAX_SEED = 2**32 - 1
MAX_BYTES = 10**15  # of one file of tensors
