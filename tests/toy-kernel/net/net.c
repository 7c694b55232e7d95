/* Something to talk with. */

char toy_buffer[1000];

int toy_talk(int word)
{
	return word + 1;
}
