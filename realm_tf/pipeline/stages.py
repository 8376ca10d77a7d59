"""All stages of a run, in order."""

from realm_tf.pipeline import corpus, open_qa, pretraining
from realm_tf.pipeline.plan import Plan
from realm_tf.pipeline.stage import Stage


def all_stages(plan: Plan) -> list[Stage]:
  """Returns the stages of the corpus, warm starts, REALM, the compared systems, the served one.

  With the built-in corpus, the last one replaces an article.

  Raises:
    ConfigError: no corpus, or an unknown system.
  """
  return [
    *corpus.corpus_stages(plan),
    *pretraining.warm_starts(plan),
    pretraining.realm(plan),
    *open_qa.zero_shot_stages(plan),
    *open_qa.system_stages(plan),
    *open_qa.serving_stages(plan),
    *open_qa.new_article_stages(plan),
  ]
