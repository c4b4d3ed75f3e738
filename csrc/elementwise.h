/* What stands between the convolutions of a network. All arrays are channels last and dense, except
   that pixels of y may lie further apart. */

/* y = activation(x * scale + shift + residual), each of the three possibly missing

   images, points, channels  of x (N, P, C)
   y_step     floats from one pixel of y to the next
   per_image  scale is (N, C), else (C,); shift is (C,) */
typedef struct {
    int32_t isa, activation, per_image;
    int64_t images, points, channels, y_step;
} fc_blend;
void fc_run_blend(const fc_blend *p, intptr_t x, intptr_t scale, intptr_t shift, intptr_t residual,
                  intptr_t y, int threads);

/* y (N, C) = the mean over the points of x (N, P, C), in at most FC_MEAN_PARTS sums per image. The
   workspace holds fc_means_size floats. */
enum { FC_MEAN_PARTS = 16 };
typedef struct {
    int32_t isa;
    int64_t images, points, channels;
} fc_means;
int64_t fc_means_size(const fc_means *p);
void fc_run_means(const fc_means *p, intptr_t x, intptr_t y, intptr_t workspace, int threads);

/* The largest value, or the mean, of every window of x; channels in and out are equal. Of a mean,
   zeros of the padding count where `counted` is set. */
typedef struct {
    fc_geometry geometry;
    int32_t isa, mean, counted;
} fc_pool;
void fc_run_pool(const fc_pool *p, intptr_t x, intptr_t y, int threads);

/* y (N, floats) = the mean, sum or largest value over a window of columns, oldest first: of the ring
   (ring, N, floats) those that are dilation * (taps - 1), ..., dilation columns old, and x (N,
   floats), column number steps (N) of its stream. Column t is in entry t mod ring. */
enum { FC_WINDOW_MEAN, FC_WINDOW_SUM, FC_WINDOW_MAX };
typedef struct {
    int32_t isa, reduce;
    int64_t streams, floats, taps, dilation, ring;
} fc_window;
void fc_run_window(const fc_window *p, intptr_t x, intptr_t ring, intptr_t steps, intptr_t y,
                   int threads);

/* y (N, P, C) = x (N, C, P), or back with rows and columns exchanged. */
typedef struct {
    int32_t isa;
    int64_t images, rows, columns;
} fc_turn;
void fc_run_turn(const fc_turn *p, intptr_t x, intptr_t y, int threads);
