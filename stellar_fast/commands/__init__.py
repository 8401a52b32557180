"""The commands of `stellar-fast`, which stellar_fast.cli registers."""
