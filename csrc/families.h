/* Index of each family in the tables of kernels. */
enum { FC_WINOGRAD, FC_DEPTHWISE, FC_GROUPED, FC_HFA, FC_CONTINUAL };
