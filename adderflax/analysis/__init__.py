"""Instruments: what a model computes, and what it costs.

from adderflax.analysis import count_operations, energy

ledger = count_operations(function, *arguments)
energy(ledger, "full").total  # millijoules
"""

from adderflax.analysis.energy_tables import TABLES, EnergyTable, NumberFormat
from adderflax.analysis.ledger import Entry, Ledger, Unknown, count_jaxpr, count_operations
from adderflax.analysis.pricing import Energy, energy

__all__ = [
    "TABLES",
    "Energy",
    "EnergyTable",
    "Entry",
    "Ledger",
    "NumberFormat",
    "Unknown",
    "count_jaxpr",
    "count_operations",
    "energy",
]
