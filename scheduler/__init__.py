"""The Conductor: the global scheduler. `core` takes events and returns commands; the other files are what it knows
and decides.

view          instances and store nodes, their state and load; `pools` of those that may be placed on
bookings      what was placed and not yet released; `starts`: when it begins to decode
prefix_index  block key -> holders by tier; `feeds` keeps it true by numbered reports
links, lengths  what is booked on NICs and SSDs; what was learnt of output lengths
placer        one placement from question to answer: `costs` predicts, `placement/` chooses, `admission/` judges, `records`
              explains, `answers` remembers
replication   which prefixes deserve a copy
roles         which instance should serve in the other pool; `switching` tells it
membership    who is in the cluster: registration, compatibility, loss
"""
