"""The same-machine read path: a client finds, leases and maps an object without asking the node.

    segment file     header page | index: cells, entries | the objects' bytes
                                   one writer, the node
    a client's file  claims, uses   one writer, that client

An object's *number* tells its life from every other; 0 means none. Who wants to read an entry leased:

    client: write the number into a claim, FENCE, read the entry's number again: still the same? then it is leased
    node:   write 0 over the entry's number, FENCE, read all claims: is it in none? then its space may be used again

Each writes before the fence what the other reads behind it, so at least one of them sees the other (Dekker). A reader that
copies needs no claim: it copies, and reads the number again; if that has changed, the copy is thrown away.

All words are aligned and 8 bytes long, read and written one by one, so none is ever seen half written. The processor must keep
the order of its stores and of its loads (`memory.ordered`); on others clients ask the node.
"""
