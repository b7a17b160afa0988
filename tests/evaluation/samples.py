"""An attempt and a source of prompts, made by hand."""
from evaluation import numbers

SOURCE = '''
class Plain(Base):
    conversation_start = (
        Message({"from": "human", "loss": None, "value": "Do " "this.\\n"}),
        Message({"from": "gpt", "loss": False, "value": "Yes."}),
    )
    _fully_first_observation = """
      Before. """.strip()
    first_observation = "Words: {{vocab}}"
    def step(self, action):
        # StepOutput(state="a comment")
        return StepOutput(state="One only.", reward=0, done=False)

class Adapter(Base):
    conversation_start_dict = {
        Format.CODE: (Message({"value": f"x {y}"}), Message({"value": "no"})),
        Format.REACT: (Message({"value": "React."}), Message({"value": "Fine."})),
    }

class Client(Base):
    def observe(self):
        return f"{self.info['observation']}\\nYOU CAN: {','.join(self.info['available_actions'])}"

class Computed(Base):
    conversation_start = (Message({"value": make()}), Message({"value": "no"}))
'''


def attempt(item, sample=0, outcome="success", reward=1.0, category="", upstream=None):
    scored = outcome in numbers.SCORED
    return {
        "item": item, "index": int(item.rsplit("_", 1)[-1]) if item[-1].isdigit() else ord(item[-1]), "sample": sample, "outcome": outcome, "category": category, "success": outcome == "success" if scored else None,
        "reward": reward if scored else None, "scaled": reward if scored else None,
        "upstream_reward": (reward if upstream is None else upstream) if scored else None, "rounds": 3, "invalid_actions": 1,
        "model_retries": 0, "tries_before": [], "seconds": 1.0, "model_seconds": 0.5, "env_seconds": 0.25,
        "usage": {"prompt": 100, "completion": 10, "cached": 40, "reasoning": 0, "unknown": 0}
    }
