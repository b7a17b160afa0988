"""What runs beside the trainer: it starts it, reads what it says, watches, explains, retries and resumes; verl trains.

It runs in the train image and on a bare host, with the standard library alone (Python 3.10).
"""
