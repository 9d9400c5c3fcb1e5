"""What surrounds a federation of several machines: keys, packages, policies, evidence, processes.

Between server and clients everything is Flower's own; here is what each side keeps on its disk.
"""
