"""The Conductor: the global scheduler. `core` takes events and returns commands; the other files are what it knows
and decides.

view          instances and store nodes, their state and load, as columns by slot
bookings      what was placed and not yet released
prefix_index  block key -> holders by tier; `feeds` keeps it true by numbered reports
costs         predicted times; `placement/` chooses by them, `admission` judges the choice, `records` explains it
membership    who is in the cluster: registration, compatibility, loss
"""
