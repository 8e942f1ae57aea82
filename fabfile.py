from swarmmail.program import tasks

ns = tasks()
