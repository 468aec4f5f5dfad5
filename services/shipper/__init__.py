"""The shipper: takes work items from the bus and delivers their files to destinations.

Read it from `shipper` (which items are in hand) to `delivery` (the fate of one item), `carrying`
(the tries to deliver it) and `destinations` (how bytes get to one kind of place). Any number of
shippers share the work.
"""
