"""Short pretraining runs that give the tiny model what Qwen3-VL and SAM 3 bring along at full size.

The release starts from a VLM that knows pictures and a detector that finds plain concepts. No such weights exist at
the tiny size, so two runs make them from the tiny world: `detector` and `vlm`. Their heads are thrown away; what is
kept are ordinary modules of an ordinary checkpoint, from which `instructsam.train` starts (``init`` in its settings).
"""
