"""What the tasks share, by subject.

tasks -> subjects (doctor, environments, serving, evaluation, training) -> engine, host -> the modules beside this one. Subjects
never import each other, and nothing here imports a task.
"""
