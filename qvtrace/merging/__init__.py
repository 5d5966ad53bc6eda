"""The files that the processes of one run wrote -> one archive.

`ranks` says whether the files belong together; `joining` puts a value's parts together; `merging`
writes the result. Nothing here needs torch.
"""

from qvtrace.merging.merging import Merge, merge

__all__ = ["Merge", "merge"]
