"""Several ranks that train one model: means over them, a probe for each, sharded parameters.

* ``ranks`` – the process group as the optimizer sees it.
* ``flat_mean``, ``average`` – flat all-reduces of gradients and of the averaged diagonal.
* ``sharded`` – DTensor parameters, of which a rank has a part.
"""
