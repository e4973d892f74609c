"""Token-level mixtures of experts in place of a transformer's MLP and attention, with a router for every task."""
