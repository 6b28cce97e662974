"""The whole cluster in one thread and in virtual time: the serving cores themselves, driven by a heap of events from one seed.

loop      the heap, and the runner of a core
network   messages between processes, connections, and what goes wrong with them
links     bandwidth that transfers share
node      a store node and its clients; data takes time, bytes do not exist
engine    the engine core, with steps priced by a cost model
instance  a prefill or decode instance: service core, engine, store clients
frontend  a frontend: dispatcher and what its clients got
cluster   all of them together, from one configuration
faults    seeded schedules of kills and partitions
workload  requests of a trace, as they come
replay    a trace through the cluster, streamed
collect   what is kept of each request
samples   how instances and links are loaded over time
report    what users saw, in numbers
"""
