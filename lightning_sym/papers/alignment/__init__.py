"""Formation of representations: six matrices of a layer become powers of one another.

Ziyin et al., 2024, arXiv 2410.03006. On both sides of a layer, the second moments of activations and of
their gradients and the Gram matrix of the weight align in pairs (six relations, the canonical
representation hypothesis) where gradient noise and weight decay balance. Where only one relation of each
side holds, all six matrices are powers of one another, with exponents between -1 and 3 (the polynomial
alignment hypothesis).

Verdicts, by ``examples/canonical_representation.py``, tanh networks on a noisy tanh teacher, five seeds,
read on 20,000 samples:

* *reproduced*: RGA of the input side is 0.97 to 0.99 in layers 3 to 5 at decays of 1.3e-4 and more (paper
  0.97 and more), if training is long enough: at 10,000 steps it is 0.91 to 0.96 at 1.3e-4. At 1.7e-3 all
  six relations are above 0.9 in the last two hidden layers. They rise with decay, ranks fall, and the
  feature ansatz rises along.
* *reproduced*: gradient noise is what balances decay. Without label noise the same networks come to 0.71 to
  0.86.
* *reproduced* where the relations hold: in layer 4 the exponents are 1.07, 2.07, 0.92 and 1.92 (a cell of
  the table: 1, 2, 1, 2). *Direction only* where they are broken: about the same exponents, but half of each
  matrix is off the weight's eigenvectors.
* *direction only* at the output layer (0.76; 0.82 with a teacher of orthogonal outputs): the gradient there
  is the labels' noise, the same in all directions, and the representation is the teacher's.
* *not seen*: G = decay^2 H. Single samples' gradients are those of the labels' noise, whatever the decay;
  without that noise the ratio of the traces rises threefold for ten times the decay, not a hundredfold.

* *not seen* at the reduced size (``examples/canonical_resnet.py``, a quarter-width ResNet-18 on 10,000 images
  of CIFAR-10, 8 epochs, accuracy 0.56, read on test images): all six above 0.7 in a head of two layers. Of
  the map to the hidden layer the least is 0.67, of the output 0.24: ten of the twelve relations are 0.66 to
  0.96, and RGA and GWA of the output's own side are 0.24 and 0.42. Training does not raise those two here;
  in networks that fit MNIST that RGA is 0.51 to 0.59 (``examples/collapse_and_alignment.py``). A
  constant rate of 0.1 with twice the decay leaves the network untrained (two seeds, accuracy 0.27).
  With training NC1 falls from 24 to 5.8 and the feature ansatz rises from 0.63 to 0.81, the output's least
  relation does not.

Read in any fit by :class:`lightning_sym.callbacks.AlignmentMonitor`, from
:mod:`lightning_sym.functional.alignment`. The room holds no code of its own.
"""
