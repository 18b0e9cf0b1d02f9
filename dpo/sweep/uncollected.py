"""Imported first by the server of `dpo.sweep.forks`: what it imports next is no garbage, and looking for some in it
takes a fifth of that time. What is forked looks again, in what it makes itself.
"""

import gc

gc.disable()
