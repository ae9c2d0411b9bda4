"""The command line: argv -> settings -> the one function to call -> a few lines out.

Knows every package by its top function and none of their insides; imports torch nowhere. Open
main.py first (the commands), then flags.py (settings as flags).
"""
