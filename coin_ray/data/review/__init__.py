"""Labels go out to people, with what the teachers make of them, and come back
corrected.
"""
