"""Where replicas are: one logical service, soft state. What it knows, nodes have told it, and would tell it again."""
