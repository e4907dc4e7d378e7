"""Many processes and machines, on Ray: an accumulator that travels, and a parameter server.

Nothing of the transport is here: Ray moves arrays, starts actors and starts them again. This room
says who counts a gradient, when, and once. Ray is imported when something of this is made.
"""
