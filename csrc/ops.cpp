// The operators on the CPU, through the LibTorch stable ABI.  With the headers beside it and cuda_ops.cpp this is the only
// code that knows torch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "convolution.h"
#include "cpu/memory.h"
#include "cpu/passes.h"
#include "schemas.h"

namespace layerwise {
namespace {

constexpr bool kHalf = false;  // float16 maps

// A large batch is convolved in pieces, each copied into z's pooled memory while its statistics are taken.  The library
// allocates a convolution's output itself, from memory that the C library tends to have returned to the system: the page
// faults of a whole large map cost up to a third of its convolution, those of one piece do not, for the next ones reuse
// it.  Smaller maps mostly come from memory that is still there, and copying them costs more than it saves.
constexpr int64_t kWholeBytes = 16 << 20;
constexpr int64_t kPieceBytes = 4 << 20;
// A piece is at least so many times larger than the weights, which each call reorders.
constexpr int64_t kPieceWeights = 8;

int64_t convolution_pieces(const Shape& z, const Tensor& weight, int64_t element_size) {
  const int64_t bytes = z.n * z.c * z.h * z.w * element_size;
  if (bytes < kWholeBytes) return 1;
  const int64_t piece = std::max(kPieceBytes, kPieceWeights * weight.numel() * element_size);
  return std::clamp<int64_t>((bytes + piece / 2) / piece, 1, z.n);
}

void parallel_for(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

// -- The normalisation as kernels take it -----------------------------------------------------------------------------

// The layout of a result: channels_last where the map's channels are innermost, contiguous otherwise.
Layout result_layout(const Tensor& z) { return readable_layout(z).value_or(Layout::kContiguous); }

// z as the kernels of this form read it: windows are cut from channels_last maps only.
std::pair<Tensor, Layout> readable_windows(const Tensor& z, const Form& form) {
  if (form.downsample == "none") return readable(z);
  if (readable_as(z, Layout::kChannelsLast)) return {z, Layout::kChannelsLast};
  return {dense_copy(z, Layout::kChannelsLast), Layout::kChannelsLast};
}

// What the forward and the backward passes share: coefficients per channel, activation, what else the form has.
struct Normalization {
  Values mean, rstd, gamma, beta;
  Activation activation;
  Extension extension;
  ChannelArrays arrays;
  OptionalTensor residual, seed;  // alive while kernels read them

  Normalization(const Tensor& z, Layout layout, Values mean_, const Values& var, const OptionalTensor& weight,
                const OptionalTensor& bias, const Form& form)
      : mean(std::move(mean_)),
        rstd(var),
        gamma(read_values(weight, mean.size(), 1.0)),
        beta(read_values(bias, mean.size(), 0.0)),
        activation(activation_of(form)),
        extension(extension_of(form, shape_of(z))),
        arrays(z.scalar_type()),
        residual(readable_gradient(form.residual, layout)),
        seed(form.seed) {
    for (double& v : rstd) v = 1.0 / std::sqrt(v + form.eps);
    if (form.slope.has_value()) extension.slopes = arrays.add(read_values(*form.slope));
    if (!residual.has_value()) return;
    extension.residual = residual->const_data_ptr();
    extension.residual_strides = strides_of(*residual);
  }

  Channels channels() { return {arrays.add(mean), arrays.add(rstd), arrays.add(gamma), arrays.add(beta)}; }
};

// Uninitialised and dense under its strides.  What is large comes from the pool of memory.h.
Tensor allocate(const Tensor& like, const Shape& s, const Strides& d, ScalarType dtype) {
  const Ints size{s.n, s.c, s.h, s.w}, strides{d.n, d.c, d.h, d.w};
#if !defined(__SANITIZE_ADDRESS__)  // the sanitizer sees overruns only in memory of its own allocator
  const int64_t element_size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  const int64_t bytes = s.n * s.c * s.h * s.w * element_size;
  if (bytes >= cpu::kPooledBytes)
    return torch::stable::from_blob(cpu::acquire(bytes), size, strides, like.device(), dtype, &cpu::release);
#endif
  return empty_strided(like, size, strides, dtype);
}

Tensor allocate_map(const Tensor& like, const Shape& s, Layout layout) {
  return allocate(like, s, dense_strides(s, layout), like.scalar_type());
}

struct Statistics {
  Values mean, var;  // of z
};

StatisticsParams statistics_params(const Tensor& z, Layout layout) {
  StatisticsParams p{};
  p.map = map_of(z, layout);
  p.z = z.const_data_ptr();
  p.z_strides = strides_of(z);
  return p;
}

Statistics finish(const cpu::BatchStatistics& statistics, int64_t channels) {
  Statistics s{Values(channels), Values(channels)};
  statistics.finish(s.mean.data(), s.var.data());
  return s;
}

Statistics batch_statistics(const Tensor& z, Layout layout) {
  cpu::BatchStatistics statistics(z.size(1));
  statistics.add(statistics_params(z, layout), parallel_for);
  return finish(statistics, z.size(1));
}

// -- Forward ------------------------------------------------------------------------------------------------------------

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, m1, m2, sums; the last three empty without bins

// z is read in `layout`; the results have that of `target`, but for a given y, whose memory may be that of z.
Moments apply(const Tensor& z, Layout layout, Layout target, Normalization& normalization, const Form& form,
              bool second_moment, bool needs_y, const OptionalTensor& given_y = {}) {
  const Shape s = shape_of(z), out = output_shape(s, form);
  const ScalarType accumulation = accumulation_type(z.scalar_type());
  const Ints cells = cells_or_rows(form, s);
  const Shape none{0, out.c, 1, 1};
  const Shape moments = form.bins.empty() ? none : Shape{out.n, out.c, form.bins[0], form.bins[1]};
  Tensor y = given_y.has_value() ? *given_y : allocate_map(z, needs_y ? out : none, layout);
  Tensor m1 = empty_map(z, moments, layout, accumulation);
  Tensor m2 = empty_map(z, second_moment ? moments : none, layout, accumulation);
  Tensor sums = empty_vector(z, sum_kinds(form, second_moment) * m1.numel(), accumulation);

  ApplyParams whole{};
  whole.map = map_of(z, layout);
  whole.bins_h = cells[0];
  whole.bins_w = cells[1];
  whole.z = z.const_data_ptr();
  whole.z_strides = strides_of(z);
  whole.y = needs_y ? y.mutable_data_ptr() : nullptr;
  whole.y_strides = strides_of(y);
  whole.channels = normalization.channels();
  whole.activation = normalization.activation;
  whole.extension = normalization.extension;
  if (!form.bins.empty()) {
    whole.m1 = m1.mutable_data_ptr();
    whole.m2 = second_moment ? m2.mutable_data_ptr() : nullptr;
    whole.sums = sums.mutable_data_ptr();
  }
  for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
    ApplyParams p = whole;
    if (sub.has_value()) {
      const int64_t bytes = z.element_size(), sum_bytes = m1.element_size();
      sub->narrow(p.extension, p.map.shape, bytes);
      sub->narrow(p.z, p.z_strides, bytes);
      sub->spread(p.y, p.y_strides, bytes);
      sub->shift(p.m1, 1, sum_bytes);
      sub->shift(p.m2, 1, sum_bytes);
      sub->shift(p.sums, 1, sum_bytes);
    }
    cpu::apply(p, parallel_for);
  });
  if (layout != target) {
    y = dense_copy(y, target);
    m1 = dense_copy(m1, target);
    m2 = dense_copy(m2, target);
  }
  return {y, m1, m2, sums};
}

Tensor channel_tensor(const Tensor& z, const Values& values) {
  Tensor t = empty_vector(z, values.size(), accumulation_type(z.scalar_type()));
  write_values(values, t);
  return t;
}

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor z) {
  check_map("z", z, kHalf);
  const auto [map, layout] = readable(z);
  const Statistics s = batch_statistics(map, layout);
  return {channel_tensor(z, s.mean), channel_tensor(z, s.var)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_moments(Tensor z, OptionalTensor weight,
                                                                          OptionalTensor bias, OptionalTensor mean,
                                                                          OptionalTensor var, LAYERWISE_FORM_PARAMETERS,
                                                                          bool second_moment, bool needs_y) {
  const Form form = LAYERWISE_FORM;
  check_outputs(form, needs_y);
  check_map("z", z, kHalf);
  check_normalization(z, shape_of(z), weight, bias, mean, var, form);

  const auto [map, layout] = readable_windows(z, form);
  const Statistics s =
      mean.has_value() ? Statistics{read_values(*mean), read_values(*var)} : batch_statistics(map, layout);
  Normalization normalization(map, layout, s.mean, s.var, weight, bias, form);
  auto [y, m1, m2, sums] = apply(map, layout, result_layout(z), normalization, form, second_moment, needs_y);
  return {y, m1, m2, sums, channel_tensor(z, s.mean), channel_tensor(z, s.var)};
}

// Convolution z of x that has_winograd; the weight is [z's channels, x's channels, 3, 3] under its strides, from `w` on.
void winograd_convolution(const Tensor& x, const void* w, const Strides& w_strides, int64_t padding_h,
                          int64_t padding_w, Tensor& z, cpu::BatchStatistics* statistics) {
  WinogradParams p{};
  p.map = map_of(z, Layout::kChannelsLast);
  p.z = z.mutable_data_ptr();
  p.z_strides = strides_of(z);
  p.x = x.const_data_ptr();
  p.x_shape = shape_of(x);
  p.x_strides = strides_of(x);
  p.padding_h = padding_h;
  p.padding_w = padding_w;
  p.w = w;
  p.w_strides = w_strides;
  cpu::winograd(p, statistics, parallel_for);
}

// Samples [first, last).
Tensor samples(const Tensor& t, int64_t first, int64_t last) {
  Tensor narrowed = t;  // narrow takes a tensor that it may change
  return torch::stable::narrow(narrowed, 0, first, last - first);
}

// Whether that is this package's own convolution.
bool convolves_by_tiles(const Tensor& input, const Tensor& w, const Shape& s, const Ints& stride, const Ints& padding,
                        const Ints& dilation, int64_t groups) {
  return groups == 1 && is_nested_channels_last(input) &&
         cpu::has_winograd(map_of(input, s, Layout::kChannelsLast), shape_of(input), strides_of(input),
                           window_of(w, stride, padding, dilation));
}

// Convolution of a small map by this package's own kernel; nothing where the library's is faster.
OptionalTensor dot_convolution(const Tensor& input, const Tensor& conv_weight, const Shape& s, const Ints& stride,
                               const Ints& padding, const Ints& dilation, int64_t groups) {
  if (groups != 1 || !is_nested_channels_last(input)) return {};
  DotParams p{};
  p.map = map_of(input, s, Layout::kChannelsLast);
  p.z_strides = dense_strides(s, Layout::kChannelsLast);
  p.x = input.const_data_ptr();
  p.x_shape = shape_of(input);
  p.x_strides = strides_of(input);
  p.window = window_of(conv_weight, stride, padding, dilation);
  p.w = conv_weight.const_data_ptr();
  p.w_dtype = dtype_of(conv_weight);
  p.w_strides = strides_of(conv_weight);
  if (!cpu::has_dot_convolution(p)) return {};
  Tensor z = allocate_map(input, s, Layout::kChannelsLast);
  p.z = z.mutable_data_ptr();
  cpu::dot_convolution(p, parallel_for);
  return z;
}

// The convolution, of shape s and in a layout that the kernels read, and its statistics where they are asked for.
std::pair<Tensor, Statistics> convolve(const Tensor& input, const Tensor& conv_weight, const Shape& s,
                                       const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                                       bool needs_statistics) {
  if (const OptionalTensor z = dot_convolution(input, conv_weight, s, stride, padding, dilation, groups))
    return {*z, needs_statistics ? batch_statistics(*z, Layout::kChannelsLast) : Statistics{}};
  const Tensor w = weight_as(conv_weight, input.scalar_type());
  const int64_t pieces = convolution_pieces(s, w, input.element_size());
  Statistics statistics;
  OptionalTensor z;
  cpu::BatchStatistics batch(s.c);
  const bool winograd = convolves_by_tiles(input, w, s, stride, padding, dilation, groups);
  if (winograd) {
    z = allocate_map(input, s, Layout::kChannelsLast);
    winograd_convolution(input, w.const_data_ptr(), strides_of(w), padding[0], padding[1], *z,
                         needs_statistics ? &batch : nullptr);
    if (needs_statistics) statistics = finish(batch, s.c);
  } else if (pieces == 1) {
    z = convolution(input, w, stride, padding, dilation, groups);
  } else {
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = s.n * i / pieces, last = s.n * (i + 1) / pieces;
      const auto [piece, layout] =
          readable(convolution(samples(input, first, last), w, stride, padding, dilation, groups));
      if (!z.has_value()) z = allocate_map(input, s, layout);
      StatisticsParams p = statistics_params(piece, layout);
      p.z_copy_strides = strides_of(*z);
      p.z_copy = static_cast<char*>(z->mutable_data_ptr()) + first * p.z_copy_strides.n * input.element_size();
      batch.add(p, parallel_for);
    }
    if (needs_statistics) statistics = finish(batch, s.c);
  }
  const auto [map, layout] = readable(*z);
  if (!winograd && pieces == 1 && needs_statistics) statistics = batch_statistics(map, layout);
  return {map, statistics};
}

std::tuple<Tensor, Tensor, Tensor> convolution_statistics(Tensor input, Tensor conv_weight, Ints stride, Ints padding,
                                                          Ints dilation, int64_t groups) {
  check_map("input", input, kHalf);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  const auto [z, statistics] = convolve(input, conv_weight, s, stride, padding, dilation, groups, true);
  return {z, channel_tensor(z, statistics.mean), channel_tensor(z, statistics.var)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_moments(
    Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mean, OptionalTensor var, Ints stride, Ints padding, Ints dilation, int64_t groups,
    LAYERWISE_FORM_PARAMETERS, bool second_moment, bool needs_y) {
  const Form form = LAYERWISE_FORM;
  check_outputs(form, needs_y);
  check_map("input", input, kHalf);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, mean, var, form);

  auto [map, statistics] = convolve(input, conv_weight, s, stride, padding, dilation, groups, !mean.has_value());
  if (mean.has_value()) statistics = {read_values(*mean), read_values(*var)};

  // The convolution's bias shifts z and its mean alike, so it is never added: only a given mean must lose it.
  if (mean.has_value() && conv_bias.has_value()) {
    const Values shift = read_values(*conv_bias);
    for (size_t c = 0; c < shift.size(); ++c) statistics.mean[c] -= shift[c];
  }
  const Layout layout = result_layout(map);
  const auto [cut, cut_layout] = readable_windows(map, form);
  Normalization normalization(cut, cut_layout, statistics.mean, statistics.var, weight, bias, form);
  auto [y, m1, m2, sums] = apply(cut, cut_layout, layout, normalization, form, second_moment, needs_y);
  return {y, m1, m2, sums, channel_tensor(map, statistics.mean), channel_tensor(map, statistics.var), map};
}

// Nobody else has z: y takes its place while it is in a cache.  Of a large map that is a piece of the batch at a time.
Tensor conv_bn_act_inference(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight,
                             OptionalTensor bias, Tensor mean, Tensor var, Ints stride, Ints padding, Ints dilation,
                             int64_t groups, LAYERWISE_FORM_PARAMETERS) {
  const Form form = LAYERWISE_FORM;
  check_map("input", input, kHalf);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, mean, var, form);
  Values shifted = read_values(mean);
  const Values shift = read_values(conv_bias, s.c, 0.0), variance = read_values(var);
  for (int64_t c = 0; c < s.c; ++c) shifted[c] -= shift[c];
  const bool in_place = downsample == "none";
  const int64_t pieces =
      in_place && !seed.has_value() && !convolves_by_tiles(input, conv_weight, s, stride, padding, dilation, groups)
          ? convolution_pieces(s, conv_weight, input.element_size())
          : 1;
  const Tensor w = pieces > 1 ? weight_as(conv_weight, input.scalar_type()) : conv_weight;
  OptionalTensor y;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = s.n * i / pieces, last = s.n * (i + 1) / pieces;
    Form part = form;
    if (pieces > 1 && residual.has_value()) part.residual = samples(*residual, first, last);
    const Tensor z =
        pieces > 1 ? readable(convolution(samples(input, first, last), w, stride, padding, dilation, groups)).first
                   : convolve(input, w, s, stride, padding, dilation, groups, false).first;
    const Layout layout = result_layout(z);
    const auto [cut, cut_layout] = readable_windows(z, form);
    Normalization normalization(cut, cut_layout, shifted, variance, weight, bias, part);
    if (pieces > 1) {
      if (!y.has_value()) y = allocate_map(input, s, layout);
      apply(cut, cut_layout, layout, normalization, part, false, true, samples(*y, first, last));
    } else {
      y = std::get<0>(apply(cut, cut_layout, layout, normalization, part, false, true,
                            in_place ? OptionalTensor(cut) : std::nullopt));
    }
  }
  return *y;
}

// -- Backward -----------------------------------------------------------------------------------------------------------

// Sums over the channels of y that belong to one channel of z.
Values fold_channels(const Values& values, int64_t step) {
  Values folded(values.size() / step);
  for (size_t i = 0; i < values.size(); ++i) folded[i / step] += values[i];
  return folded;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_moments_backward_sums(Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1,
                                                                OptionalTensor grad_m2, Tensor sums, Tensor mean,
                                                                Tensor var, OptionalTensor weight, OptionalTensor bias,
                                                                LAYERWISE_FORM_PARAMETERS) {
  const Form form = LAYERWISE_FORM;
  check_map("z", z, kHalf);
  check_normalization(z, shape_of(z), weight, bias, mean, var, form);
  check_gradients(z, grad_y, grad_m1, grad_m2, form);
  const bool both = check_sums(z, grad_m1, grad_m2, sums, form);
  const bool learned = slope.has_value();
  const int64_t step = channel_step(form), channels = z.size(1);
  Values dbeta(channels * step), dgamma(channels * step), dslope(channels * step);

  if (grad_m1.has_value() || grad_m2.has_value()) {
    // The sums lie as the forward pass left them.
    const Layout layout = form.downsample == "none" ? result_layout(z) : Layout::kChannelsLast;
    const OptionalTensor p1 = dense_gradient(grad_m1, layout), p2 = dense_gradient(grad_m2, layout);
    CellSumsParams p{};
    p.map = map_of(z, output_shape(shape_of(z), form), layout);
    p.bins_h = bins[0];
    p.bins_w = bins[1];
    p.p = data_or_null(p1);
    p.q = data_or_null(p2);
    p.sums = sums.const_data_ptr();
    p.slope_sums = both ? 4 : 2;
    p.dbeta = dbeta.data();
    p.dgamma = dgamma.data();
    p.dslope = learned ? dslope.data() : nullptr;
    cpu::cell_sums(p, parallel_for);
  }
  dbeta = fold_channels(dbeta, step);
  dgamma = fold_channels(dgamma, step);
  dslope = fold_channels(dslope, step);
  if (grad_y.has_value()) {
    const auto [map, layout] = readable_windows(z, form);
    const Tensor g = *readable_gradient(grad_y, layout);
    Normalization normalization(map, layout, read_values(mean), read_values(var), weight, bias, form);
    DenseSumsParams whole{};
    whole.map = map_of(map, layout);
    whole.z = map.const_data_ptr();
    whole.z_strides = strides_of(map);
    whole.grad_y = g.const_data_ptr();
    whole.grad_y_strides = strides_of(g);
    whole.channels = normalization.channels();
    whole.activation = normalization.activation;
    whole.extension = normalization.extension;
    for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
      DenseSumsParams p = whole;
      if (sub.has_value()) {
        sub->narrow(p.extension, p.map.shape, z.element_size());
        sub->narrow(p.z, p.z_strides, z.element_size());
        sub->spread(p.grad_y, p.grad_y_strides, z.element_size());
      }
      cpu::dense_sums(p, dbeta.data(), dgamma.data(), learned ? dslope.data() : nullptr, parallel_for);
    });
  }
  dslope.resize(learned ? channels : 0);
  return {channel_tensor(z, dgamma), channel_tensor(z, dbeta), channel_tensor(z, dslope)};
}

// The gradients of y, m1 and m2 and everything else that dz depends on, kept alive while kernels read it.
struct GradientInputs {
  Tensor z;
  Layout layout;
  const Form& form;
  OptionalTensor grad_y, grad_m1, grad_m2;
  Normalization normalization;
  InputGradientParams params{};

  GradientInputs(const Tensor& z_, Layout layout_, const OptionalTensor& grad_y_, const OptionalTensor& grad_m1_,
                 const OptionalTensor& grad_m2_, const Tensor& dgamma, const Tensor& dbeta, const Tensor& mean,
                 const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, const Form& form_,
                 double count)
      : z(z_),
        layout(layout_),
        form(form_),
        grad_y(readable_gradient(grad_y_, layout)),
        grad_m1(dense_gradient(grad_m1_, layout)),
        grad_m2(dense_gradient(grad_m2_, layout)),
        normalization(z, layout, read_values(mean), read_values(var), weight, bias, form) {
    const int64_t channels = z.size(1);
    Values mean_dbeta(channels), mean_dgamma(channels);
    const Values total_dbeta = read_values(dbeta), total_dgamma = read_values(dgamma);
    for (int64_t c = 0; c < channels && count > 0; ++c) {  // none with fixed statistics
      const double scale = normalization.gamma[c] * normalization.rstd[c] / count;
      mean_dbeta[c] = scale * total_dbeta[c];
      mean_dgamma[c] = scale * total_dgamma[c];
    }
    const Ints cells = cells_or_rows(form, shape_of(z));
    params.map = map_of(z, layout);
    params.bins_h = cells[0];
    params.bins_w = cells[1];
    params.z = z.const_data_ptr();
    params.z_strides = strides_of(z);
    params.grad_y = data_or_null(grad_y);
    if (grad_y.has_value()) params.grad_y_strides = strides_of(*grad_y);
    params.p = data_or_null(grad_m1);
    params.q = data_or_null(grad_m2);
    params.channels = normalization.channels();
    params.scaled_mean_dbeta = normalization.arrays.add(mean_dbeta);
    params.scaled_mean_dgamma = normalization.arrays.add(mean_dgamma);
    params.activation = normalization.activation;
    params.extension = normalization.extension;
  }
  GradientInputs(const GradientInputs&) = delete;

  // dz may be z itself; the gradient of the residual may be absent.
  void write(Tensor& dz, OptionalTensor& grad_residual) {
    InputGradientParams whole = params;
    whole.dz = dz.mutable_data_ptr();
    whole.dz_strides = strides_of(dz);
    if (grad_residual.has_value()) {
      whole.dresidual = grad_residual->mutable_data_ptr();
      whole.dresidual_strides = strides_of(*grad_residual);
    }
    for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
      InputGradientParams p = whole;
      if (sub.has_value()) narrow(p, *sub);
      cpu::input_gradient(p, parallel_for);
    });
  }

 private:
  void narrow(InputGradientParams& p, const SubMap& sub) const {
    const int64_t bytes = z.element_size(), sum_bytes = z.scalar_type() == ScalarType::Double ? 8 : 4;
    sub.narrow(p.extension, p.map.shape, bytes);
    sub.narrow(p.z, p.z_strides, bytes);
    sub.narrow(p.dz, p.dz_strides, bytes);
    if (p.dresidual != nullptr) sub.narrow(p.dresidual, p.dresidual_strides, bytes);
    if (p.grad_y != nullptr) sub.spread(p.grad_y, p.grad_y_strides, bytes);
    sub.shift(p.p, 1, sum_bytes);
    sub.shift(p.q, 1, sum_bytes);
  }
};

// Memory for the gradient of the residual.
OptionalTensor empty_residual(const Tensor& z, Layout layout, bool needed) {
  if (!needed) return {};
  return allocate_map(z, shape_of(z), layout);
}

std::tuple<Tensor, Tensor> bn_act_moments_backward(Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1,
                                                   OptionalTensor grad_m2, Tensor dgamma, Tensor dbeta, Tensor mean,
                                                   Tensor var, OptionalTensor weight, OptionalTensor bias,
                                                   LAYERWISE_FORM_PARAMETERS, double count, bool needs_residual) {
  const Form form = LAYERWISE_FORM;
  check_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form, kHalf);
  const auto [map, layout] = readable_windows(z, form);
  Tensor dz = allocate_map(z, shape_of(z), layout);
  OptionalTensor grad_residual = empty_residual(z, layout, needs_residual && residual.has_value());
  GradientInputs(map, layout, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form, count)
      .write(dz, grad_residual);
  const Layout target = result_layout(z);
  const auto result = [&](const Tensor& t) { return layout == target ? t : dense_copy(t, target); };
  const Tensor none = empty_vector(z, 0, z.scalar_type());
  return {result(dz), grad_residual.has_value() ? result(*grad_residual) : none};
}

// Uninitialised, float32, with the strides of the weight where it is dense under them.  Gradients stay until the optimizer
// has run, while activations come and go: these leave room for them.
Tensor empty_weight_gradient(const Tensor& weight) {
  if (is_dense(weight, Layout::kChannelsLast) || is_dense(weight, Layout::kContiguous))
    return allocate(weight, shape_of(weight), strides_of(weight), ScalarType::Float);
  const Tensor like = torch::stable::empty_like(weight);
  return like.scalar_type() == ScalarType::Float ? like : torch::stable::to(like, ScalarType::Float);
}

// The weight gradient with dz formed inside it and never written.
Tensor fused_weight_gradient(GradientInputs& gradient, const Tensor& input, const Tensor& conv_weight,
                             const Ints& stride, const Ints& padding, const Ints& dilation) {
  WeightGradientParams p{};
  p.gradient = gradient.params;
  p.x = input.const_data_ptr();
  p.x_shape = shape_of(input);
  p.x_strides = strides_of(input);
  p.window = window_of(conv_weight, stride, padding, dilation);
  Tensor dw = empty_weight_gradient(conv_weight);
  cpu::weight_gradient(p, static_cast<float*>(dw.mutable_data_ptr()), strides_of(dw), parallel_for);
  return dw.scalar_type() == conv_weight.scalar_type() ? dw : torch::stable::to(dw, conv_weight.scalar_type());
}

// The gradient of the input, where that is a convolution that has_winograd: of dz with the weight turned around, from
// output to input channels.
std::optional<Tensor> winograd_input_gradient(const Tensor& dz, const Tensor& input, const Tensor& conv_weight,
                                              const Window& window) {
  Window turned = window;
  turned.padding_h = window.kernel_h - 1 - window.padding_h;
  turned.padding_w = window.kernel_w - 1 - window.padding_w;
  // Where ATen would write channels_last, too.
  const bool channels_last = is_nested_channels_last(input) || is_nested_channels_last(conv_weight);
  if (!channels_last || turned.padding_h < 0 || turned.padding_w < 0 || !is_nested_channels_last(dz) ||
      !cpu::has_winograd(map_of(dz, shape_of(input), Layout::kChannelsLast), shape_of(dz), strides_of(dz), turned))
    return std::nullopt;
  const Tensor w = weight_as(conv_weight, dz.scalar_type());
  const Strides s = strides_of(w);
  const int64_t last = (window.kernel_h - 1) * s.h + (window.kernel_w - 1) * s.w;
  Tensor gradient = allocate_map(dz, shape_of(input), Layout::kChannelsLast);
  winograd_convolution(dz, static_cast<const char*>(w.const_data_ptr()) + last * w.element_size(),
                       {s.c, s.n, -s.h, -s.w}, turned.padding_h, turned.padding_w, gradient, nullptr);
  return gradient;
}

// Gradients of input, conv_weight and residual; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor, Tensor> conv_backward(bool overwrite, Tensor z, OptionalTensor grad_y,
                                                 OptionalTensor grad_m1, OptionalTensor grad_m2, Tensor dgamma,
                                                 Tensor dbeta, Tensor mean, Tensor var, OptionalTensor weight,
                                                 OptionalTensor bias, LAYERWISE_FORM_PARAMETERS, double count,
                                                 Tensor input, Tensor conv_weight, Ints stride, Ints padding,
                                                 Ints dilation, int64_t groups, bool needs_input, bool needs_weight,
                                                 bool needs_residual, bool overwrite_grad_y) {
  const Form form = LAYERWISE_FORM;
  check_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form, kHalf);
  check_convolution_backward(z, input, conv_weight, stride, padding, dilation, groups, kHalf);
  if (overwrite_grad_y) check_overwritten_gradient(z, grad_y, form, overwrite, needs_residual);
  const auto [map, layout] = readable_windows(z, form);
  GradientInputs gradient(map, layout, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form, count);
  const Window kernel = window_of(conv_weight, stride, padding, dilation);
  const bool plain = groups == 1 && input.scalar_type() == z.scalar_type();
  const auto none = [&] { return empty_vector(z, 0, z.scalar_type()); };
  needs_residual = needs_residual && residual.has_value();
  Tensor grad_weight = none();
  // First, from z, which dz may replace.  Where dz must be written anyway, only tiles are worth forming it once more; that
  // of interleaved channels is written in parts.
  const Map& dz_map = gradient.params.map;
  if (needs_weight && plain && !is_interleaved(form) &&
      (needs_input || needs_residual ? cpu::has_winograd(dz_map, shape_of(input), strides_of(input), kernel)
                                     : cpu::has_weight_gradient(dz_map, shape_of(input), strides_of(input), kernel))) {
    grad_weight = fused_weight_gradient(gradient, input, conv_weight, stride, padding, dilation);
    needs_weight = false;
  }
  if (!needs_input && !needs_weight && !needs_residual) return {none(), grad_weight, none()};
  Tensor dz = overwrite ? map : allocate_map(z, shape_of(z), layout);
  OptionalTensor grad_residual = overwrite_grad_y ? grad_y : empty_residual(z, layout, needs_residual);
  gradient.write(dz, grad_residual);
  std::optional<Tensor> grad_input;
  if (needs_input && plain) grad_input = winograd_input_gradient(dz, input, conv_weight, kernel);
  if (needs_weight || (needs_input && !grad_input.has_value())) {
    const auto [other_input, other_weight] =
        convolution_gradients(dz, input, conv_weight, stride, padding, dilation, groups,
                              needs_input && !grad_input.has_value(), needs_weight);
    if (!grad_input.has_value()) grad_input = other_input;
    if (needs_weight) grad_weight = other_weight;
  }
  if (overwrite_grad_y) grad_residual.reset();
  if (grad_residual.has_value() && layout != result_layout(z))
    grad_residual = dense_copy(*grad_residual, result_layout(z));
  return {grad_input.value_or(none()), grad_weight, grad_residual.value_or(none())};
}

using ConvBackward = BackwardForm<&conv_backward, false>;
using ConvBackwardInPlace = BackwardForm<&conv_backward, true>;  // z's memory becomes dz's

// running = (1 - momentum) * running + momentum * batch, with the unbiased variance of `count` elements.
void update_running_statistics_(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, OptionalTensor shift,
                                int64_t count, double momentum) {
  const int64_t channels = mean.numel();
  check_channels("running_mean", running_mean, mean, channels);
  check_channels("running_var", running_var, mean, channels);
  check_channels("var", var, mean, channels);
  check_channels("conv_bias", shift, mean, channels);
  Values new_mean = read_values(running_mean), new_var = read_values(running_var);
  const Values batch_mean = read_values(mean), batch_var = read_values(var), offset = read_values(shift, channels, 0.0);
  const double unbiased = count / (count - 1.0);
  for (int64_t c = 0; c < channels; ++c) {
    new_mean[c] = (1 - momentum) * new_mean[c] + momentum * (batch_mean[c] + offset[c]);
    new_var[c] = (1 - momentum) * new_var[c] + momentum * batch_var[c] * unbiased;
  }
  write_values(new_mean, running_mean);
  write_values(new_var, running_var);
}

}  // namespace
}  // namespace layerwise

STABLE_TORCH_LIBRARY(layerwise_ext, m) { layerwise::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(layerwise_ext, CPU, m) {
  using namespace layerwise;
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("bn_act_moments", TORCH_BOX(&bn_act_moments));
  m.impl("convolution_statistics", TORCH_BOX(&convolution_statistics));
  m.impl("conv_bn_act_moments", TORCH_BOX(&conv_bn_act_moments));
  m.impl("conv_bn_act_inference", TORCH_BOX(&conv_bn_act_inference));
  m.impl("bn_act_moments_backward_sums", TORCH_BOX(&bn_act_moments_backward_sums));
  m.impl("bn_act_moments_backward", TORCH_BOX(&bn_act_moments_backward));
  m.impl("conv_bn_act_moments_backward", TORCH_BOX(&ConvBackward::call));
  m.impl("conv_bn_act_moments_backward_", TORCH_BOX(&ConvBackwardInPlace::call));
  m.impl("update_running_statistics_", TORCH_BOX(&update_running_statistics_));
}
