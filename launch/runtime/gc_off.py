"""The first import of the fork server: no looking for garbage among what it imports, and keeps.

That took a sixth of the imports' time. Each rank collects again, of what is its own.
"""

import gc

gc.disable()
