"""Lists of what a GPU is told, written by hand."""

from ctc_spec_jax import thunks

HEAD = """\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCopy [source | sink] kCopy
    002: kWhile [source | sink]
condition:
        003: kCustomKernel [source | sink] early_fusion grid: [1, 1, 1]
      body:
        004: kCustomKernel [source | sink] sort_9 grid: [1, 1, 1]
005: kWhile         [prev=000 (1) | sink        ]
condition:
    006: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
"""
BODY = """\
    000: kCommandBuffer [source       | next=009 (1)]
        007: kCustomKernel [source       | next=008 (1)] gemm_fusion_dot_1 grid: [512, 1, 1]
        008: kCublasLtMatmul [prev=007 (1) | sink        ] kCublasLtMatmul
        014: kConditional  [prev=010 (1) | sink        ]
          false_branch:
            011: kCopy         [source       | next=012 (1)] kCopy
            012: kCustomKernel [prev=011 (1) | sink        ] sort_6_1 grid: [16, 1, 1]
          true_branch:
            013: kCustomKernel [source | sink] loop_multiply_fusion grid: [64, 1, 1]
    009: kAsyncStart    [source       | next=000 (3)] stream=communication_stream[0], async_id=7
        015: kAllReduce [source | sink] kAllReduce
    016: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        No thunks.      body:
        000: kCommandBuffer [source | sink]
            017: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
    018: kAsyncDone     [source       | sink        ] async_id=7
"""
TURN = dict(total=8, products=2, sorts=1, copies=1, collectives=1)


def test_a_loop_of_graphs():
    """Two graphs, the condition and the sum are started by the host; an early loop is smaller."""
    found = thunks.summary(HEAD + BODY)
    assert found == thunks.Kernels(**TURN, starts=4, one_graph=False)


def test_a_loop_in_a_graph():
    """What encloses the loop starts everything in it; what precedes it does not."""
    lines = (HEAD + BODY).splitlines()[7:]
    outer = ["000: kCommandBuffer [source | sink]", *("    " + line for line in lines)]
    found = thunks.summary("\n".join(outer))
    assert found == thunks.Kernels(**TURN, starts=0, one_graph=True)
    beside = thunks.summary("000: kCommandBuffer [source | sink]\n" + "\n".join(lines))
    assert beside.starts == 4 and not beside.one_graph


def test_without_a_loop():
    assert thunks.summary("001: kCopy [source | sink] kCopy\n").total == 0
    assert thunks.summary("") == thunks.Kernels(0, 0, 0, 0, 0, 0, False)
