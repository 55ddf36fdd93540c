// What the graph takes and gives, written from its contract; see ../contract.json.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace contract {

constexpr int HEIGHT = $height, WIDTH = $width;
constexpr bool UINT8_INPUT = $uint8_input;  // RGB, [batch, height, width, 3]; otherwise float 0..1, [batch, 3, height, width]
constexpr bool LETTERBOX = $letterbox;  // whether pictures of another size may be scaled into the input
constexpr const char* INPUT_NAME = "$input_name";
constexpr std::array<std::int64_t, 4> INPUT_SHAPE{$input_shape};
constexpr std::size_t INPUT_BYTES = $input_bytes;
constexpr std::array<std::uint8_t, 3> PADDING_COLOUR{$padding_colour};

struct Output {
    const char* name;
    std::size_t bytes;
};

constexpr std::array<Output, $output_count> OUTPUTS{{
$outputs
}};

// Label 0 is the background and is never given.
inline const std::unordered_map<int, const char*> NAMES{
$names
};

}  // namespace contract
